"""What answers are worth: tasks and texts, the adapter's training, the demo, and parity with transformers."""

"""What answers are worth: suites and their scores under recipes, the adapter's training, the demo, and parity with
transformers."""

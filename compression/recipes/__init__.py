"""One file a recipe: its slots, where it comes from, and where it departs from what was published."""

"""Training stories, one script each: slides to tiles to views; views to loss; loss to release."""

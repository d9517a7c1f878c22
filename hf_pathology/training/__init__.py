"""The one training loop and its tools; it knows neither slides nor models."""

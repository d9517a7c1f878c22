"""From a trained model or a published checkpoint to a directory on the Hub."""

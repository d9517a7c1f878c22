"""Pictures and pages of what was done."""

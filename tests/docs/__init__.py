"""README, pages and examples taken at their word."""

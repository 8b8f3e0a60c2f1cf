"""The six MAD tasks, profiles of architectures, and mixture weights programmed with them."""

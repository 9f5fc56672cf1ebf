"""Images for the adapter: reading them, encoding them, and projecting their features to prompts."""

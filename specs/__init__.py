"""What a user writes, what optc writes back, and how an error reads."""

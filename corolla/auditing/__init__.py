"""What an audit is made of: canaries, what is guessed of them, and what that proves."""

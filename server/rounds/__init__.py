"""One round: who is asked, what is sent, what is accepted, and what it sums to."""

"""Tables of ablations: what a table file says, its runs, and what they found."""

"""What we ran and what came out."""

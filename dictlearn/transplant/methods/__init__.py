"""Ways to make up the rows of new tokens; one file a way, and one line in `Method`."""

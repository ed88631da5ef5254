"""Speed and memory, each beside a peer or the ideal in the same run; a JSON line out."""

"""Whether others' dictionaries code as they do in their own libraries."""

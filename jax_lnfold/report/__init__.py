"""What a fold found and did, for people: text, tables, HTML and pictures."""

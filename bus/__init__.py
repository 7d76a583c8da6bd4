"""What joins the processors: messages, links, membership, memory and records. Imports nothing of ours."""

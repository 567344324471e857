"""What a memory layer keeps its tokens in: dense tokens, compressed segments, one compressed period."""

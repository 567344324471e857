"""The codec: K and V of a cache that waits, in a twentieth of their bytes."""

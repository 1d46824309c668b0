"""What torch, and those who build on it, expect of an optimizer; held by every optimizer of the library."""

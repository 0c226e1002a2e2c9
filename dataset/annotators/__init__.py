"""What is made from processed pictures by networks or taken from the user: depth maps and captions."""

"""Pure decisions: no socket, file, clock, thread, randomness or Kong word."""

"""What tests of hybrids need: a Hub on this machine."""

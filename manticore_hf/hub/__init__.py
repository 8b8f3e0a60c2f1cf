"""Hybrids on the Hub: publishing, cards, licences, and looking at what others published."""

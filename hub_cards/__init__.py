"""Templates of what people read on the Hub; installed as `manticore_hf.hub_cards`. The sections of a card are blocks."""

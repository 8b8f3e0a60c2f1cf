"""Templates of what people read on the Hub; installed as `manticore_hf.hub_cards`. Blocks are sections of a card."""

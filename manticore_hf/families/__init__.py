"""Which model types of Transformers can be components: tiny models of all, what they must do, and the table of them."""

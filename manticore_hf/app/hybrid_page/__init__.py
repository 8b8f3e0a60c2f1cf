"""A page to try a hybrid in a browser; copied as it is into every Space that `manticore-hf app` writes."""

"""A page to try a hybrid in a browser, here or as a Space: `manticore-hf app`."""

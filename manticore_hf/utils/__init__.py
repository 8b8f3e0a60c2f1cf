"""What every room uses: files, formatting, plots, processes."""

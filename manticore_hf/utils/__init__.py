"""What every subpackage uses: files, formatting, plots, processes."""

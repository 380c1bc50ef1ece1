"""Files that an exported folder carries: `nightshift export` copies them, nothing here runs them."""

"""Files that an exported folder carries: `nightshift export` copies them; they run there."""

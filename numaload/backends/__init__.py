"""numaload inside other programs: each file gives one of them its weights, in its own words."""

"""Ask Linux: memory calls, where pages are, mounts, cgroups, files of /sys."""

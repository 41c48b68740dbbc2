"""Know the machine: nodes, memory, devices, the user's folder; threads pinned to nodes."""

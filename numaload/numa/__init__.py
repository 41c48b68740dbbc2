"""What the machine is made of, and where pages and threads really are."""

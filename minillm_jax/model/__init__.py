"""What is computed: pure functions, with thin Linen modules on them."""

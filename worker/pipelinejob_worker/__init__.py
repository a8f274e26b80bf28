"""What runs in a stage pod."""

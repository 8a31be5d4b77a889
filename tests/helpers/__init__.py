"""What several tests share: running commands, drawing image folders, planted data."""

"""What a run is: its settings, and the rules that they keep."""

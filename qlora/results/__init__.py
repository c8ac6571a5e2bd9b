"""What a run leaves behind for people: the report, the plots and the closing tables."""

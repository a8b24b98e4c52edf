"""What a run tells about itself: the journal, figures, and one HTML page."""

"""An HTML page that plays and shows the stems of a track together."""

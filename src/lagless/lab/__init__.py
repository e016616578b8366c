"""Studies that a person starts; the library never imports them."""

"""What `verify_verl.py` is made of."""

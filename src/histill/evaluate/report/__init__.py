"""`histill report`: the results of every benchmark and encoder on one page that opens offline."""

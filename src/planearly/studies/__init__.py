"""What a study is asked: the claims and tables of one paper each. Imports study; cli names them."""

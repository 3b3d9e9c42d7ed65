"""What a study is asked: the claims and tables of one paper each. Imports study, stages and what
lies below; cli names them."""

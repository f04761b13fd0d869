from . import app


app()

"""What MLflow runs to make the registered model (mlflow_model.py); nothing else imports this."""

from mlflow.models import set_model

from nightshift.mlflow_model import ChatFunction

set_model(ChatFunction())

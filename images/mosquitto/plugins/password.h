/* Passwords as mosquitto_passwd writes them. */
#ifndef FLEETWRIGHT_PASSWORD_H
#define FLEETWRIGHT_PASSWORD_H

/* A struct mosquitto_pw, as a value of a file of users; NULL where the text is no hash. */
void *password_parse(const char *text);
void password_free(void *password);

#endif
